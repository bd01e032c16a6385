"""The parts of `Audit`, each about one thing that people do with an audit."""
