"""Images: decoding, folders, data sets of the hub, streams, and leaves drawn by code."""
