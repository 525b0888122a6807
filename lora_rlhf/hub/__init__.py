"""The Hugging Face Hub: what is pushed of a run, its model card, and the push itself."""
