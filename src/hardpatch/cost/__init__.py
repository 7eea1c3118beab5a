"""What a step costs: operations and memory."""
