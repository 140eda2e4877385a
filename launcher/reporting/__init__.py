"""What a person sees and what is logged."""
