"""What an encoder's feature maps are worth: semantic segmentation, detection and instance segmentation."""
