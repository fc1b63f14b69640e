"""What a process gives up about itself before it touches anything from outside."""
