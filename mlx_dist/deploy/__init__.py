"""`mlx-dist cluster`: a server on several hosts, from checking them to leaving nothing on them."""
