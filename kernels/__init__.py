"""Operations of a SegNet step, each with its PyTorch reference."""
