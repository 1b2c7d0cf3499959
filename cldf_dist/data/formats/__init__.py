"""File formats: NIfTI, DICOM, DICOM-SEG, masks as PNG, tables of labels."""
