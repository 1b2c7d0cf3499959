"""What the commands do: stages in order, several objects, new scans, answers for batch scripts."""
