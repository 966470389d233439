"""Banking77: which of 77 intents a customer's question has."""
