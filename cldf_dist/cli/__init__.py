"""The commands: stages in order, several objects, new scans, answers for batch scripts."""
