"""Commands that compare, plan, examine and time runs."""
