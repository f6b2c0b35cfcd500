"""What a CLIP is measured by: labelled images, prompts of classes, zero-shot classification, shift."""
