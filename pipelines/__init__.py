"""The data path: from a sample plan to a batch on the device."""
