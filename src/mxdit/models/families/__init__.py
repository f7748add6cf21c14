"""The families that come with mxdit: a file each, whose `SPECS` are registered with `import mxdit`."""
