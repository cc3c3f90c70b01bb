"""What is proven of a loaded model and what that costs."""
