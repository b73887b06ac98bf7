"""Ray Serve applications: the gateway before the teacher (`gateway.py`) and the students it compares (`student.py`)."""
