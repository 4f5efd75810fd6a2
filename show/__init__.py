"""What a person looks at: the memory plan, transcripts, the report, answers as they are written."""
