"""One engine a file; `ladezeit.loading.registry` knows them by name."""
