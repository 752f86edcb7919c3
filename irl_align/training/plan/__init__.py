"""What a recipe needs, before it runs."""
