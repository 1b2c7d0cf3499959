"""One reader a data set: files of patients to volumes."""
