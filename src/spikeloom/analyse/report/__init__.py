"""The HTML report of runs: `data` gathers and measures, `render` writes the page from the templates in `page/`."""
