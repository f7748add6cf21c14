"""An offline calibrator: weights rounded for the inputs that they meet, and a budget of more bits spent where it buys most."""
