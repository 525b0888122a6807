"""The parts of `card.py`: each a generator that yields (what was measured, figures) as soon as it has them."""
