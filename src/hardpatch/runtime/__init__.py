"""What any command needs of the machine it runs on; knows nothing of the method."""
