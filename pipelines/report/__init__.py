"""How a comparison is shown: `tables` for the terminal and Markdown, charts and pictures, and `page` for all of it."""
