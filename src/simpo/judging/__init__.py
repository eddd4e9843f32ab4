"""What says how good an answer is: scorers of one answer and judges of two, each behind one protocol."""
