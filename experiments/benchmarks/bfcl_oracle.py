"""BFCL's own AST checker as a filter: one entry with predictions in, one list of verdicts out, a JSON line each.

    .bfcl/bin/python experiments/benchmarks/bfcl_oracle.py < entries.jsonl > verdicts.jsonl

It runs in an environment that has `bfcl-eval` and nothing of this project. The checker imports its list of models and
its Java and JavaScript parsers, which Python cases never use and which need dozens of packages: those are stood in for.
An entry is {"category", "functions", "ground_truth", "predictions": [[{name: arguments}]]}, a verdict [valid, why].
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any


class _Model:
    underscore_to_dot = False  # names are compared as they are


def _stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def main() -> None:
    """Judge every entry of the standard input."""
    _stand_in("bfcl_eval.constants.model_config", MODEL_CONFIG_MAPPING={"any": _Model()})
    for language in ("java", "js"):
        module = f"bfcl_eval.eval_checker.ast_eval.type_convertor.{language}_type_converter"
        _stand_in(module, **{f"{language}_type_converter": None})
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    for line in sys.stdin:
        entry = json.loads(line)
        verdicts = []
        for prediction in entry["predictions"]:
            if "irrelevance" in entry["category"]:  # as `_evaluate_single_relevance_entry`: right without any call
                verdicts.append([not prediction, "irrelevance_error:decoder_success" if prediction else ""])
                continue
            try:
                found = ast_checker(
                    entry["functions"], prediction, entry["ground_truth"], Language.PYTHON, entry["category"], "any"
                )
                verdicts.append([found["valid"], "" if found["valid"] else found["error_type"]])
            except Exception as error:  # a checker that fails has not accepted
                verdicts.append([False, f"crash: {type(error).__name__}: {error}"[:80]])
        print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
