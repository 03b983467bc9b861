"""The web page of `tinyclip app`, and its protection.

`page` is the page, `guard` and `door` decide which requests reach it, `serving` runs the server.

May import: search, report, train and below. Start with `page`."""
