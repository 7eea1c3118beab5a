"""What the commands of hardpatch data do."""
