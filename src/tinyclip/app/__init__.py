"""The web page of `tinyclip app`, and what guards it.

`page` is the page, `guard` and `door` decide which requests reach it, `serving` runs the server.

May import: search and below. Start with `page`."""
