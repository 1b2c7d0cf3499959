"""`cldf doctor`: does all that a run needs work here? Each line is ok, warning or error."""
