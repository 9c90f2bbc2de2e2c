"""Tables of labels: what is known of images, apart from their features."""
