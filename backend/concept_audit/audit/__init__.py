"""An audit in Python: `Audit`, and its parts, each about one thing that people do with an audit."""
