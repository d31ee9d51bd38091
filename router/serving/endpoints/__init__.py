"""The endpoints, a file for each family; each takes the server and a request."""
