"""Microsoft Presidio as a finder for redaction: names of people and whatever else its recognisers know.

    redactor = presidio.redactor(Redaction(presidio=Presidio(model="en_core_web_sm", entities=("PERSON",))))
    # "I am Jane Miller"  →  "I am <PERSON_1>"

Needs `pip install 'flywheel-ray[presidio]'` and a spaCy model. Nothing is loaded or fetched before `finder` is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from flywheel_ray.errors import ConfigError
from flywheel_ray.redaction import Finder, Presidio, Redaction, Redactor

_PIECE = 100_000
"""Characters given to spaCy at once; it refuses more than a million."""

_LONE = re.compile("[\ud800-\udfff]")


def redactor(config: Redaction) -> Redactor:
    """The redactor of a configuration, with Presidio where it asks for that.

    Raises:
        ConfigError: see `finder`.
    """
    return Redactor(config, finder(config.presidio) if config.presidio else None)


def finder(settings: Presidio) -> Finder:
    """Load the spaCy model and Presidio's recognisers of its language; takes seconds, and memory for the model.

    Source: `presidio_analyzer.AnalyzerEngine`, https://microsoft.github.io/presidio/analyzer/

    Raises:
        ConfigError: Presidio or the model is not installed, or no recogniser of that language finds an entity.
    """
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NlpEngineProvider
    except ImportError as error:
        raise ConfigError(
            f"redaction.presidio needs a package that is not installed ({error}). "
            "Run: pip install 'flywheel-ray[presidio]'"
        ) from None
    if not spacy.util.is_package(settings.model):  # Presidio would fetch it, and end the process where it cannot
        raise ConfigError(
            f"redaction.presidio.model: the spaCy model {settings.model!r} is not installed. "
            f"Run: python -m spacy download {settings.model}"
        )
    models = [{"lang_code": settings.language, "model_name": settings.model}]
    engine = AnalyzerEngine(
        nlp_engine=NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models}).create_engine(),
        supported_languages=[settings.language],
    )
    known = engine.get_supported_entities(settings.language)
    if unknown := [entity for entity in settings.entities if entity not in known]:
        raise ConfigError(
            f"redaction.presidio.entities: nothing finds {', '.join(unknown)} in language {settings.language!r}; "
            f"known are {', '.join(sorted(known))}"
        )

    def find(text: str) -> Iterator[tuple[int, int, str]]:
        start = 0
        while start < len(text):
            end = len(text)
            if end - start > _PIECE:
                space = text.rfind(" ", start, start + _PIECE)
                end = space + 1 if space > start else start + _PIECE
            piece = _LONE.sub("\ufffd", text[start:end])
            for result in engine.analyze(
                piece,
                language=settings.language,
                entities=list(settings.entities),
                score_threshold=settings.min_score,
            ):
                yield start + result.start, start + result.end, result.entity_type
            start = end

    return find
