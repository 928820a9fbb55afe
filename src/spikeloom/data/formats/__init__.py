"""File formats of event cameras and of data sets, each read by a module of its own; `read` tells them apart."""
