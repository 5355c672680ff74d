"""What a run says of itself: metrics, satisfaction, the choice of a checkpoint, completions, cards, pushes."""
