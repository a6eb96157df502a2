"""Components that Streamlit lacks."""
