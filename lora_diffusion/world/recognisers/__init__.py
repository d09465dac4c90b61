"""Training and measurement of the face detector and the two recognisers of the embedded world."""
