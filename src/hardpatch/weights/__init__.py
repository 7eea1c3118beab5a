"""Weights from elsewhere: reading them, adapting them to a run, converting them and back."""
