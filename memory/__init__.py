"""What is kept, what is dropped, and when memory goes back."""
