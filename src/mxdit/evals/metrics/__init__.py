"""What an evaluation measures, and how each number is defined."""
