"""What every command can be told, as typed dataclasses; free of torch, so that help is quick."""
