"""flywheel-ray: turn a teacher model's production traffic into a small student that can replace it.

    logs → records → dataset → candidates → trials → leaderboard → rollout → (shadow logs) → logs

The README shows the rooms of the package; importing it starts nothing, reads nothing and connects to nothing.
"""

__version__ = "0.1.0"
