"""What the kernels share: addressing of listed tokens, masks, and the softmax step."""
