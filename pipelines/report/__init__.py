"""How a comparison is shown: `tables` for the terminal and Markdown, `plots` for charts, `page` for the HTML report."""
