"""Finished and running runs as one HTML page: reads run folders, needs neither torch nor numpy, writes one file.

`runs` reads folders, `quantities` knows what metrics mean, `scales` places numbers, `curves` and `reliability` draw,
`tables` compares, `page` puts them together with `style` and `script`. Whatever the page holds goes through `markup`,
which escapes.
"""
