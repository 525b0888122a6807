"""How long a run takes at best on a card that is not here: operations are counted on shapes, without any numbers."""
