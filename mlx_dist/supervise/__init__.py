"""`mlx-dist serve --supervise`: ranks that are started again, and clients that do not notice."""
