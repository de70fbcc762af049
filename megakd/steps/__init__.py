"""What one step of a run computed: on disk, as one whole whatever the layout, and compared with another.

`folder` defines the bytes, `whole` puts the ranks' parts together, `tokens` and `compare` find what differs first,
`words` says it.
"""
