"""What a pre-trained encoder and its loss predictor are worth."""
