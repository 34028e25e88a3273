"""The rules. No network, disk, clock or dice: values in, values out."""
